"""What is seen from outside: metrics, logs, traces, and the record of a request that they are made from."""
