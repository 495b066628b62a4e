"""Examples as training reads them: in memory or on disk, in an order, packed into micro-batches."""
