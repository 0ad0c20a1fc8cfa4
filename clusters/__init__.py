"""What machines exist and how ranks start on them."""
