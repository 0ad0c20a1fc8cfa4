"""How one model is split over a mesh and stepped. Knows nothing of jobs or machines."""
