"""Networks, run folders and fault injection that several test modules share."""
