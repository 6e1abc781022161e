"""What analysis found, in print: terminal, JSON, one page of HTML."""
