"""Data: pairs of image and mask from folders or generated, the tensors made of them, and augmentations."""
