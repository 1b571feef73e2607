"""What attention over a SparseK selection and attention over lists share: rows that read compact lists of keys."""
