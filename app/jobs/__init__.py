"""Jobs: what a client asks for, the steps it unfolds into, and the leases under which workers run them."""
