"""What ties us to other projects; each module is imported only when it is asked for."""
