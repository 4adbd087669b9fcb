"""Studies of many runs, and what runs them: `python -m studies.run STUDY --out=DIRECTORY`."""
