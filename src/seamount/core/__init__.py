"""The shared language of Seamount: ids, requests, errors, ports, settings. Holds no torch and imports no other room."""
