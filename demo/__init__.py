"""What `make demo` runs, and the small real model that it runs on."""
