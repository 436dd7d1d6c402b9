"""What `radnode demo` needs around a node: a study to send and a PACS to receive the results."""
