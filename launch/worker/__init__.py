"""The built-in training program: one language model, one mesh, one loop; run on every rank."""
