"""What runs on the device: the kernels, and the functions they share."""
