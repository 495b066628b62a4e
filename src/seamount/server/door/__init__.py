"""What stands before every route: sockets, TLS, who may come in, limits of bodies and connections."""
