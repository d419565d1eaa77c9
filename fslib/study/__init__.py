"""What turns the method into a study: units of work, records, profiles, engines."""
