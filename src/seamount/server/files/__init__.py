"""Files of tenants, kept in the state database."""
