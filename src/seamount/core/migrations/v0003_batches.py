"""Step 3: files and batches of each tenant.

A file is text: either in chunks of whole lines (`number` counts them from 0, `first_line` the lines from 1), or, where
it has a `batch_id`, the results of that batch which failed or did not. It is seen once its state is ready. A batch is
worked on by the server that holds its lease. Its results are whole lines, under the number of the line that they
answer, so no line is answered twice. Times are Unix seconds; ids sort by the time of their making.
"""

STATEMENTS = (
    """CREATE TABLE files (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        purpose TEXT NOT NULL,
        filename TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('uploading', 'ready')),
        num_bytes BIGINT NOT NULL,
        created_s BIGINT NOT NULL,
        touched_s BIGINT NOT NULL,
        expires_s BIGINT NOT NULL,
        batch_id TEXT,
        is_failed BIGINT CHECK (is_failed IN (0, 1)))""",
    "CREATE INDEX files_by_tenant ON files (tenant, created_s, id)",
    "CREATE INDEX files_by_end ON files (expires_s)",
    """CREATE TABLE file_chunks (
        file_id TEXT NOT NULL REFERENCES files (id) ON DELETE CASCADE,
        number BIGINT NOT NULL,
        first_line BIGINT NOT NULL,
        content TEXT NOT NULL,
        PRIMARY KEY (file_id, number))""",
    """CREATE TABLE batches (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        key_id TEXT,
        endpoint TEXT NOT NULL,
        model TEXT NOT NULL,
        input_file_id TEXT NOT NULL,
        metadata TEXT,
        output_lifetime_s BIGINT NOT NULL,
        status TEXT NOT NULL,
        errors TEXT,
        num_total BIGINT NOT NULL,
        num_completed BIGINT NOT NULL,
        num_failed BIGINT NOT NULL,
        completed_bytes BIGINT NOT NULL,
        failed_bytes BIGINT NOT NULL,
        output_file_id TEXT,
        error_file_id TEXT,
        created_s BIGINT NOT NULL,
        expires_s BIGINT NOT NULL,
        in_progress_s BIGINT,
        finalizing_s BIGINT,
        completed_s BIGINT,
        failed_s BIGINT,
        expired_s BIGINT,
        cancelling_s BIGINT,
        cancelled_s BIGINT,
        ended_s BIGINT,
        lease_owner TEXT,
        lease_until_s BIGINT)""",
    "CREATE INDEX batches_by_tenant ON batches (tenant, created_s, id)",
    "CREATE INDEX batches_by_end ON batches (ended_s)",
    """CREATE TABLE batch_results (
        batch_id TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE,
        line BIGINT NOT NULL,
        is_failed BIGINT NOT NULL CHECK (is_failed IN (0, 1)),
        content TEXT NOT NULL,
        PRIMARY KEY (batch_id, line))""",
)
