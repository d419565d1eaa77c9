"""Notebook 09: look at heads one by one."""

from fslib.study.headwise import head_units
from fslib.study.records import Unit
from fslib.study.study import Study, plans


@plans("09")
def plan(study: Study) -> list[Unit]:
    """Return the first main model, its importance and pruning, every head alone, and what heads attend to."""
    seed = study.seeds[0]
    return [*study.units(seed), *head_units(study, seed)]
