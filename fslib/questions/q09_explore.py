"""Notebook 09: look at heads one by one."""

from fslib.study.headwise import lesion_unit, pattern_unit
from fslib.study.records import Unit
from fslib.study.study import Study, plans


@plans("09")
def plan(study: Study) -> list[Unit]:
    """Return the first main model, its importance and pruning, every head alone, and what heads attend to."""
    seed = study.seeds[0]
    alone = [lesion_unit(study, seed)] if study.profile.lesion_seeds else []
    return [*study.units(seed), *alone, pattern_unit(study, seed)]
