"""What turns the method into a study: units and their records, profiles, evidence, plots, notebooks, commands."""
