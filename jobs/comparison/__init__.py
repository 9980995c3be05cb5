"""What ``jobs.compare`` makes of run folders: numbers on one side, the page on the other, and between them one dict."""
