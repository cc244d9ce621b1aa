"""What the labs of the course share. The labs themselves are the programs beside this folder."""
