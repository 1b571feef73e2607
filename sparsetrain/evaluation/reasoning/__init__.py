"""Questions whose answer follows from several facts of a long text: a small world (BABILong's kind), and graphs."""
