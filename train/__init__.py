"""Training: data, the objective, the loop, and the commands around them."""
