"""One LightningModule trained under several precisions, each in a process of its own."""
