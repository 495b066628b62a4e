"""Step 4: how much each tenant's kept responses take, and what tokens a batch's answers took.

`num_bytes` is a response's share of its tenant's row in `response_totals`, which is written with it, so that nobody has
to add up a tenant's rows. Of responses from before this step it is the number of characters: no function that counts
bytes has the same name in both kinds of database. Whoever changes rows of a tenant writes its total first: so those who
do so at once wait for each other, and never in a circle.

A batch from before this step has no counts of tokens, for what its first lines took was not kept: NULL, and NULL plus a
number stays NULL.
"""

STATEMENTS = (
    "ALTER TABLE responses ADD COLUMN num_bytes BIGINT NOT NULL DEFAULT 0",
    "UPDATE responses SET num_bytes = LENGTH(items) + LENGTH(response)",
    "CREATE INDEX responses_by_tenant ON responses (tenant, expires_s)",
    "CREATE TABLE response_totals (tenant TEXT PRIMARY KEY, num_bytes BIGINT NOT NULL)",
    """INSERT INTO response_totals (tenant, num_bytes)
        SELECT tenant, SUM(num_bytes) FROM responses GROUP BY tenant""",
    "ALTER TABLE batches ADD COLUMN input_tokens BIGINT",
    "ALTER TABLE batches ADD COLUMN cached_tokens BIGINT",
    "ALTER TABLE batches ADD COLUMN output_tokens BIGINT",
    "ALTER TABLE batches ADD COLUMN reasoning_tokens BIGINT",
)
