"""Video-QA datasets: one file each."""
