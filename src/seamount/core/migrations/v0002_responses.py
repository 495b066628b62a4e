"""Step 2: responses that were kept, each with the whole conversation before it.

`items` is the JSON list of what the response answers, earlier responses' output included; `response` is the JSON of
the response itself. `tenant` needs no row in `tenants`: a server without keys keeps responses too.
"""

STATEMENTS = (
    """CREATE TABLE responses (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        key_id TEXT,
        model TEXT NOT NULL,
        created_s BIGINT NOT NULL,
        expires_s BIGINT NOT NULL,
        items TEXT NOT NULL,
        response TEXT NOT NULL)""",
    "CREATE INDEX responses_by_expiry ON responses (expires_s)",
)
