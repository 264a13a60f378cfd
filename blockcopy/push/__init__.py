"""A push: the source's end of a copy to another host, over as many connections as pay."""
