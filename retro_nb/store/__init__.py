"""From a corpus to its database: chunks, vectors, index, neighbours, and what reads them."""
