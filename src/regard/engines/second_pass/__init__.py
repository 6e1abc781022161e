"""The second pass: the weights from q, k and lse, and what observers keep of them."""
