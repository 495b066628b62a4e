"""Records of users, and the examples that training makes of them."""
