"""Files and arrays on disk, processes and devices, for all other subpackages."""
