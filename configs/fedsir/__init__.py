"""The packaged configurations of FedSIR."""
