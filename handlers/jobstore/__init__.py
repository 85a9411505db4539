"""What handlers keep beside the jobs: write admission, rebuild state and records."""
