"""The page of `regard view`: a server on loopback, and the modules that draw the page."""
