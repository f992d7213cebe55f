"""What will it take: time, memory, operations?"""
