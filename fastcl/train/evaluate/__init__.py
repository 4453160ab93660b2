"""How good an encoder is: neighbours, linear classifiers and pairs of views, and pictures of them."""
