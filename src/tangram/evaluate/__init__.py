"""Tasks that tell how well compressed conversations are still answered."""
