"""cvlaunch: one computer-vision training job, many places to run it, one result."""
