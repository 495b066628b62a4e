"""Step 1: tenants, API keys, and the tokens that each key used per day (UTC, as 2027-01-31).

`models` and `routes` are JSON lists, NULL for all; a limit of NULL is none. Keys are never deleted, so that usage keeps
its owner and a database that has had an administrator is known as such.
"""

STATEMENTS = (
    "CREATE TABLE tenants (name TEXT PRIMARY KEY, created_s BIGINT NOT NULL)",
    """CREATE TABLE api_keys (
        id TEXT PRIMARY KEY,
        digest TEXT NOT NULL,
        tenant TEXT NOT NULL REFERENCES tenants (name),
        label TEXT NOT NULL,
        is_admin BIGINT NOT NULL CHECK (is_admin IN (0, 1)),
        models TEXT,
        routes TEXT,
        requests_per_minute BIGINT,
        tokens_per_minute BIGINT,
        max_concurrent BIGINT,
        priority BIGINT NOT NULL CHECK (priority BETWEEN -1 AND 1),
        created_s BIGINT NOT NULL,
        expires_s BIGINT,
        revoked_s BIGINT)""",
    """CREATE TABLE usage (
        key_id TEXT NOT NULL REFERENCES api_keys (id),
        day TEXT NOT NULL,
        num_prompt_tokens BIGINT NOT NULL CHECK (num_prompt_tokens >= 0),
        num_generated_tokens BIGINT NOT NULL CHECK (num_generated_tokens >= 0),
        PRIMARY KEY (key_id, day))""",
)
