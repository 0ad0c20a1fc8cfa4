"""One YAML to rehearsal, prediction and job."""
