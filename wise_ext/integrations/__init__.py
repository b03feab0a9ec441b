"""Other projects' engines, tools and formats: each module is imported only when it is asked for."""
