"""Reading and storing traces: ring, columns, the Trace object, verification, recovery, export."""
