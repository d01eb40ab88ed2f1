# The package puts a copy of its own source here.
