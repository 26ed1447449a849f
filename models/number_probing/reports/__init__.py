"""What is written about a table or about several runs, and the command lines that write it."""
