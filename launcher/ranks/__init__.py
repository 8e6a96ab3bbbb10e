"""The processes of a job: started, brought together, watched and ended."""
