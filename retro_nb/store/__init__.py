"""From a corpus to its database: chunks, vectors, index and neighbours, and their readers."""
