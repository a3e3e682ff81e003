"""What needs no download: procedural images, the tasks made of them, and the handwritten digits."""
