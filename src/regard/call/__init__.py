"""What is asked of attention: masks, biases, observers, and the one checked `Call`."""
