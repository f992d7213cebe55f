"""Files and arrays on disk, processes, devices: what every other room uses."""
