"""What the tests of all operators share: cases, the oracle and its tolerance."""
